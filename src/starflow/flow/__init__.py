"""The model, data to noise. Imports `nn` and what lies below; never `sampling`."""
