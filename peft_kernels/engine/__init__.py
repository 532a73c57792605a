"""The engine: sites, tuners and their life (attach, merge, save, count, fit). It knows no op and no model library."""
