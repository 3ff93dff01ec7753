"""The networks, their checkpoints and the device they run on."""
