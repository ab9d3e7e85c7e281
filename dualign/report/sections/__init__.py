"""The sections of the report page: for each a module of values, and its template part."""
