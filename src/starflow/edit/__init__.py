"""Pictures that are already there: inpainting, editing, variations and interpolation by the exact density."""
