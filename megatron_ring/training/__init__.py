"""One optimizer step after another: engine, loss, schedule, metrics, and the loop that ties them."""
