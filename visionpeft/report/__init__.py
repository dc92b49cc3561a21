"""Tables and self-contained HTML reports."""
