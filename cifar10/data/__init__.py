"""Images: where they come from, how a batch is drawn and augmented."""
