"""Own kernels, one folder an operation: reference, CPU and GPU implementations behind one dispatcher."""
