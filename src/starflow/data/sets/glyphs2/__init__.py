"""The set "glyphs2": emoji in eight styles, people, things as 3D models and clip art, icons; from packages."""
