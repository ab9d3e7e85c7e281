"""The certificate: candidates, tests, evidence, and the record that anybody can verify."""
