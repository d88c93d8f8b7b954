"""Signal processing that losses and metrics share: differentiable, on any device, batch first."""
