"""Running TensorRT engines: what goes where, decided without a device; and the calls that need one."""
