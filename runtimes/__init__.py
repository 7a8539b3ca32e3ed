"""Run baked parts: one file a backend, and the Diffusers pipeline around them."""
