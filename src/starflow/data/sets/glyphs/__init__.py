"""The glyph set: about 4,000 captioned emoji in four drawing styles, built from packages of the npm registry."""
