"""The bank: cohorts of adapters, trained, probed, merged and measured; kept as rows."""
