"""Type stubs of the native core (checked against it by stubtest)."""

__version__: str
