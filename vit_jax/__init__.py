"""The Vision Transformer in JAX and Flax. `import vit_jax` needs JAX alone."""
