"""Data sets of captioned images: where they lie, how they are indexed, augmented, and cached as latents."""
