"""The operations of core, fast: append, select and attend on every backend."""
