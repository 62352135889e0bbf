"""What a run will cost, counted from the config and the layouts before anything is started."""
