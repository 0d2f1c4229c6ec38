"""The calls that cveff makes of TensorRT and CUDA, checked against the real Python bindings, without a GPU.

What it shows: every class, attribute, enum member, argument and type that our code uses exists in releases 10.7 and
11.4. What it cannot show: that a plan is built, runs, is fast or is accurate.
"""
