"""One file a module class of Diffusers or Transformers."""
