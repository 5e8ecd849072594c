output "policy_documents" {
  description = "The policies as JSON, by name: streaming, promotion, drills, and with keys sealing and unsealing."
  value       = local.policies
}

output "policy_arns" {
  description = "ARNs of the policies, by name."
  value       = { for name, policy in aws_iam_policy.this : name => policy.arn }
}

output "role_arns" {
  description = "ARNs of the roles that were made, by name: controller, drills."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}
