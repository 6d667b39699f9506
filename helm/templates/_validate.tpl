{{/* Combinations of values that cannot work, each with what to do. */}}
{{- define "mx.validate" -}}
{{- with .Values -}}
{{- $many := include "mx.manyReplicas" $ -}}
{{- if and $many (eq .metadata.store "memory") -}}
{{- if eq .workload.kind "daemonset" -}}
{{- fail "\nworkload.kind is daemonset, and metadata.store is memory: workers of one node would not find those of another. Set metadata.store to redis or kubernetes." -}}
{{- end -}}
{{- fail (printf "\nworkload.replicas is %d, and metadata.store is memory: each replica would know other workers. Set metadata.store to redis or kubernetes, or workload.replicas to 1." (int .workload.replicas)) -}}
{{- end -}}
{{- if and (eq .workload.kind "daemonset") (ne (int .workload.replicas) 1) -}}
{{- fail (printf "\nworkload.replicas is %d, and workload.kind is daemonset, which has one replica on each node. Leave workload.replicas at 1." (int .workload.replicas)) -}}
{{- end -}}

{{- if .cache.enabled -}}
{{- $own := list "emptyDir" -}}
{{- if eq .workload.kind "statefulset" -}}{{- $own = list "emptyDir" "claim" -}}{{- end -}}
{{- if eq .workload.kind "daemonset" -}}{{- $own = list "emptyDir" "hostPath" -}}{{- end -}}
{{- if and $many (not (has .cache.volume $own)) -}}
{{- fail (printf "\ncache.volume is %s, and several replicas of a %s would share it: a directory of the cache is of one server at a time, also with ReadWriteMany. Set workload.kind to statefulset with cache.volume=claim, which has a volume for each replica, or cache.volume to emptyDir, or workload.replicas to 1." .cache.volume .workload.kind) -}}
{{- end -}}
{{- if and (eq .cache.volume "existingClaim") (not .cache.existingClaim) -}}
{{- fail "\ncache.volume is existingClaim, and cache.existingClaim is empty. Set it to the name of the claim." -}}
{{- end -}}
{{- if and (ne .cache.volume "existingClaim") .cache.existingClaim -}}
{{- fail (printf "\ncache.existingClaim is %s, and cache.volume is %s, which does not use it. Set cache.volume to existingClaim." .cache.existingClaim .cache.volume) -}}
{{- end -}}
{{- if and .cache.prepareHostPath (ne .cache.volume "hostPath") -}}
{{- fail (printf "\ncache.prepareHostPath is true, and cache.volume is %s. Set cache.volume to hostPath, or cache.prepareHostPath to false." .cache.volume) -}}
{{- end -}}
{{- end -}}

{{- if eq .metadata.store "redis" -}}
{{- if and .metadata.redis.url .metadata.redis.secret -}}
{{- fail "\nmetadata.redis.url and metadata.redis.secret are both set: only one can say where Redis is. Remove one." -}}
{{- end -}}
{{- if not (or .metadata.redis.url .metadata.redis.secret) -}}
{{- fail "\nmetadata.store is redis, and nothing says where Redis is. Set metadata.redis.url, or metadata.redis.secret if the URL has a password." -}}
{{- end -}}
{{- else if or .metadata.redis.url .metadata.redis.secret -}}
{{- fail (printf "\nmetadata.redis is set, and metadata.store is %s, which does not use it. Set metadata.store to redis." .metadata.store) -}}
{{- end -}}

{{- if and .tls.enabled (not .tls.secret) (not .tls.certManager.enabled) -}}
{{- fail "\ntls.enabled is true, and there is no certificate. Set tls.secret, or tls.certManager.enabled with tls.certManager.issuer." -}}
{{- end -}}
{{- if and (not .tls.enabled) (or .tls.secret .tls.certManager.enabled .tls.clientCa.pem .tls.clientCa.configMap) -}}
{{- fail "\nA certificate or an authority is set, and tls.enabled is false: the server would speak plain text. Set tls.enabled to true." -}}
{{- end -}}
{{- if and .tls.secret .tls.certManager.enabled -}}
{{- fail "\ntls.secret and tls.certManager.enabled are both set: only one can give the certificate. Remove one." -}}
{{- end -}}
{{- if and .tls.certManager.enabled (not .tls.certManager.issuer) -}}
{{- fail "\ntls.certManager.enabled is true, and tls.certManager.issuer is empty. Set it to the name of an issuer." -}}
{{- end -}}
{{- if and .tls.clientCa.pem .tls.clientCa.configMap -}}
{{- fail "\ntls.clientCa.pem and tls.clientCa.configMap are both set: only one can give the authority. Remove one." -}}
{{- end -}}

{{- $byToken := has .auth.mode (list "token" "kubernetes") -}}
{{- if and $byToken (not .tls.enabled) (not .auth.acceptPlaintextTokens) -}}
{{- fail (printf "\nauth.mode is %s, and tls.enabled is false: clients send no token in plain text. Set tls.enabled with a certificate, or auth.acceptPlaintextTokens where the network encrypts." .auth.mode) -}}
{{- end -}}
{{- if and (eq .auth.mode "token") (not .auth.token.secret) -}}
{{- fail "\nauth.mode is token, and auth.token.secret is empty. Set it to the name of a Secret that lists tokens of callers." -}}
{{- end -}}
{{- if and (ne .auth.mode "token") (or .auth.token.secret .auth.token.ownSecret) -}}
{{- fail (printf "\nauth.token is set, and auth.mode is %s: its tokens would have no effect. Set auth.mode to token." .auth.mode) -}}
{{- end -}}
{{- if and (eq .auth.mode "token") (include "mx.replicaEndpoint" $) (not .auth.token.ownSecret) -}}
{{- fail "\nauth.mode is token, and replicas read from each other: they need a token of their own. Set auth.token.ownSecret to the name of a Secret with it." -}}
{{- end -}}
{{- if and (eq .auth.mode "mtls") (not .tls.enabled) -}}
{{- fail "\nauth.mode is mtls, and tls.enabled is false: there are no certificates without TLS. Set tls.enabled with a certificate." -}}
{{- end -}}
{{- if and (eq .auth.mode "mtls") (not .auth.mtls.caSecret) (not (include "mx.tlsSecretHasCa" $)) -}}
{{- fail "\nauth.mode is mtls, and no authority of callers' certificates is set. Set auth.mtls.caSecret, or tls.secretHasCa if tls.secret has ca.crt." -}}
{{- end -}}
{{- if and (ne .auth.mode "mtls") .auth.mtls.caSecret -}}
{{- fail (printf "\nauth.mtls.caSecret is %s, and auth.mode is %s: no caller would need a certificate. Set auth.mode to mtls." .auth.mtls.caSecret .auth.mode) -}}
{{- end -}}
{{- if and (eq .auth.mode "kubernetes") (not .auth.kubernetes.serviceAccounts) -}}
{{- fail "\nauth.mode is kubernetes, and auth.kubernetes.serviceAccounts is empty: nobody would be answered. List namespace:name of the workers' service accounts." -}}
{{- end -}}
{{- if and (ne .auth.mode "kubernetes") .auth.kubernetes.serviceAccounts -}}
{{- fail (printf "\nauth.kubernetes.serviceAccounts is set, and auth.mode is %s: it would have no effect. Set auth.mode to kubernetes." .auth.mode) -}}
{{- end -}}
{{- if and (eq .auth.mode "none") .auth.rights -}}
{{- fail "\nauth.rights is set, and auth.mode is none: every caller would be answered. Set auth.mode to token, mtls or kubernetes." -}}
{{- end -}}

{{- $identity := .credentials.workloadIdentity -}}
{{- $identities := compact (list $identity.awsRoleArn $identity.gcpServiceAccount $identity.azureClientId) -}}
{{- if gt (len $identities) 1 -}}
{{- fail "\nSeveral values of credentials.workloadIdentity are set: pods run in one cloud. Keep one; give the others' credentials by credentials.secrets." -}}
{{- end -}}
{{- if and $identities (not .serviceAccount.create) -}}
{{- fail "\ncredentials.workloadIdentity is set, and serviceAccount.create is false: the chart cannot annotate an account of others. Annotate it yourself, or set serviceAccount.create to true." -}}
{{- end -}}
{{- if and (or $identities .credentials.secrets .credentials.googleKeySecret) (eq .auth.mode "none") (not .credentials.acceptAnonymousCallers) -}}
{{- fail "\ncredentials are set, and auth.mode is none: every pod that reaches the server could read what they can read. Set auth.mode to token, mtls or kubernetes, or credentials.acceptAnonymousCallers to true." -}}
{{- end -}}
{{- if and (or $identities .credentials.secrets .credentials.googleKeySecret) (not .cache.enabled) -}}
{{- fail "\ncredentials are set, and cache.enabled is false: the server downloads nothing. Remove them, or set cache.enabled to true." -}}
{{- end -}}

{{- if and (include "mx.asksApi" $) (not .rbac.create) (not .serviceAccount.name) -}}
{{- fail "\nrbac.create is false, and the server asks the API server under an account that nothing gives rights. Set serviceAccount.name to an account with the rights in helm/files/rbac.json, or rbac.create to true." -}}
{{- end -}}

{{- range .extraEnv -}}
{{- if has .name (splitList "," (include "mx.envNames" $)) -}}
{{- fail (printf "\nextraEnv sets %s, which the chart sets itself. Use the value that docs and `helm show readme` name for it." .name) -}}
{{- end -}}
{{- end -}}

{{- $reserved := list "MODEL_EXPRESS_URL" "MX_TLS_CA_PATH" "MX_AUTH_TOKEN_PLAINTEXT" -}}
{{- range $name, $_ := .client.env -}}
{{- if has $name $reserved -}}
{{- fail (printf "\nclient.env sets %s, which the chart sets itself. Remove it; values of tls and auth decide it." $name) -}}
{{- end -}}
{{- end -}}

{{- if and .injection.enabled (not (include "mx.injectionApi" $)) -}}
{{- fail "\ninjection.enabled is true, and the cluster has no MutatingAdmissionPolicy (admissionregistration.k8s.io/v1 since Kubernetes 1.36, v1beta1 since 1.34 where it is turned on). Set injection.enabled to false, and use the ConfigMap with envFrom." -}}
{{- end -}}
{{- end -}}
{{- end -}}
