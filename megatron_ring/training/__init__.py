"""One optimizer step after another: engine, loss, schedule, metrics, and the loop that ties them."""

import logging

# Said by every process before anything else, and no news to who runs on a CPU; hence before deepspeed is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
