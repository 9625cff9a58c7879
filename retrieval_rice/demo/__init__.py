"""The page that recognises products in the browser."""
