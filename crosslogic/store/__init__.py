"""All SQL, one file per noun. Postgres is the truth."""
