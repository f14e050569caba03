"""Results for people: tables, pictures, the model card."""
