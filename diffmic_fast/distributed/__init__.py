"""Several processes: collectives, sharded parameters, batch statistics over all processes."""
