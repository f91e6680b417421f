"""Training and inference by several processes: collectives, DDP and FSDP2, synchronised batch statistics."""
