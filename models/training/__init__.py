"""Training of the embedded model `shapes` from nothing but the scene generator: `python -m bakeoff.models.training`.

Tokenizer, then VAE, then text encoder, then text encoder and UNet together. Seeded; batches depend on the step number
alone, and the state is saved every few minutes, so an interrupted training goes on where it was.
"""
