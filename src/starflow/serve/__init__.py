"""Pictures for others: a scheduler that batches a flow block by block, an HTTP service and a web page on top of it."""
