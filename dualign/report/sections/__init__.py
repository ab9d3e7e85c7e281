"""The sections of the report page: for each a module that gathers its values, and its template
part.
"""
