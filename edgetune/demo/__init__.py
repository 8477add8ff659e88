"""`edgetune demo`: a whole federation on one machine, measured."""
