"""What a run derives from its configuration before anything is built, and the rules it is checked by."""
