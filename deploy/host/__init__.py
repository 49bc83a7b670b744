"""This machine: processors, GPUs as the driver lists them, versions of libraries, the cache folder."""
