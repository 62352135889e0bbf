"""DeepSpeed behind one door: its engines, the loss they average, gradient norms and the step gate."""

import logging

# DeepSpeed logs this in every process when it is imported; it is no news on a machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
