"""Client-side sharding for PostgreSQL inside SQLAlchemy."""
