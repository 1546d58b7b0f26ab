"""The records that results.json is made of, by what they tell; `robustkit.results` has them all."""
