"""A stateful double of Stripe: what billing needs of its API, as documented, with faults to order."""
