"""Files, weights on the disk, and the Hugging Face hub; nothing here knows a model."""
