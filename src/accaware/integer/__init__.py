"""The integer layer, the plain record that proofs, emulation and export read, and what can be done with it."""
