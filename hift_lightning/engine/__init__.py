"""HiFT in plain torch: partition, rotation, residency, update and delayed learning rate."""
