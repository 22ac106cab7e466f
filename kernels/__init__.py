"""Triton kernels, one module an operation: private kernels, and a `launch` that allocates and checks nothing."""

if __name__ != "fastdet.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}: it is the package `fastdet.kernels`, reached through the link "
        "fastdet/kernels; write `from fastdet.kernels import nms` (a bare `kernels` is another project's name)"
    )
