"""The mixture of experts: router, experts, and the layer that brings tokens to them."""
