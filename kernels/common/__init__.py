"""Device functions and kernels that the kernels of the ops are composed of."""
