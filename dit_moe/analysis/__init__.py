"""Where the experts go: what the routers of a trained network do on held-out data, counted, drawn and described."""
