"""The demo page: recognition of products in the browser."""
