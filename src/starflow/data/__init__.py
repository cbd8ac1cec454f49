"""Data: image folders, the glyph set, cached training views."""
