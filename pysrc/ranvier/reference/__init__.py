"""The formulas in plain torch: any float type, nothing fused, nothing packed. Every backend is held against these."""
