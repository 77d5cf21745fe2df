"""The decode step in Triton: one kernel a file, queued by ``launch``. Importing this package imports no triton."""
