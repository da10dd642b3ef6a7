"""What layers, links and steps cost on a cluster."""
