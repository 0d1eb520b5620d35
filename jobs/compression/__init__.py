"""The mathematics that techniques share: grids, packing, masks, low rank, budgets."""
