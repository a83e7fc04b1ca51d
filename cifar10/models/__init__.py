"""Networks beside the story's own, one file per family; each file's `build()` makes its network, freshly initialised."""
