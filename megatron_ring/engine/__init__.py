"""The DeepSpeed engines, driven one optimizer step at a time, and what they need from DeepSpeed."""

import logging

# DeepSpeed logs this in every process on import; it is not worth a line on a machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
